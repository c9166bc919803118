# Scenarios that end badly, to see what is left: python -m behave --tags=@broken features/broken
@broken
Feature: Broken

  Scenario: It fails halfway
    Given Ann has logged in
    And a kettle
    When Ann puts 1 of the kettle into the basket
    And Ann orders
    Then it fails

  @killed
  Scenario: Its process is killed
    Given Ann has logged in
    And a kettle
    When Ann puts 1 of the kettle into the basket
    And Ann orders
    Then its process is killed
